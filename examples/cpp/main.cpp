/* Loads an exported module through tvm-ffi's C++ API, calls it, and checks every bit of the result.
 *
 * Needs the module, tvm-ffi (`pip install apache-tvm-ffi`) and a C++17 compiler; not TVM, and at
 * run time neither Python nor this repository:
 *
 *   qknorm-tvm export qknorm.so --q-cols 1536 --k-cols 256 --head-dim 128 --rotary-dim 64 \
 *       --op apply_qk_rms_norm --op qk_rms_norm_rope_cache
 *   g++ -O2 $(tvm-ffi-config --cxxflags) main.cpp -o main \
 *       $(tvm-ffi-config --ldflags) -Wl,-rpath,$(tvm-ffi-config --libdir) $(tvm-ffi-config --libs)
 *   ./main qknorm.so
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

namespace ffi = tvm::ffi;

namespace {

constexpr DLDataType kFloat32{kDLFloat, 32, 1};
constexpr DLDataType kBFloat16{kDLBfloat, 16, 1};
constexpr DLDataType kInt64{kDLInt, 64, 1};

uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float FromBFloat16(uint16_t half) {
  uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds half to even; a NaN stays one.
uint16_t ToBFloat16(float value) {
  if (std::isnan(value)) return 0x7fc0;
  uint32_t bits = BitsOf(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A tensor over memory that the caller keeps: slices of one buffer need no copy.
class View {
 public:
  View(void* data, DLDataType type, std::vector<int64_t> shape, std::vector<int64_t> strides)
      : shape_(std::move(shape)), strides_(std::move(strides)) {
    tensor_.data = data;
    tensor_.device = DLDevice{kDLCPU, 0};
    tensor_.ndim = static_cast<int32_t>(shape_.size());
    tensor_.dtype = type;
    tensor_.shape = shape_.data();
    tensor_.strides = strides_.data();
    tensor_.byte_offset = 0;
  }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  operator ffi::TensorView() const { return ffi::TensorView(&tensor_); }

 private:
  std::vector<int64_t> shape_, strides_;
  DLTensor tensor_;
};

// The operation as it is defined, one element at a time.
uint16_t Expected(uint16_t x, float var, float gamma, float epsilon) {
  float rs = 1.0f / std::sqrt(var + epsilon);
  float scaled = FromBFloat16(x) * rs;
  return ToBFloat16(scaled * gamma);
}

// One head after the norm: neox pairs of the first columns rotated. Products of two bfloat16 are
// exact in float32, so that a compiler may contract them.
std::vector<uint16_t> Rotated(std::vector<uint16_t> head, const uint16_t* cos_sin,
                              int64_t rotary_dim) {
  const int64_t half = rotary_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    float a = FromBFloat16(head[i]), b = FromBFloat16(head[i + half]);
    float c = FromBFloat16(cos_sin[i]), s = FromBFloat16(cos_sin[i + half]);
    head[i] = ToBFloat16(a * c - b * s);
    head[i + half] = ToBFloat16(b * c + a * s);
  }
  return head;
}

uint32_t NextRandom(uint32_t* state) { return *state = *state * 1664525u + 1013904223u; }

constexpr int64_t kRows = 37, kQCols = 1536, kKCols = 256, kWidth = kQCols + 2 * kKCols;
constexpr int64_t kHeadDim = 128, kRotaryDim = 64, kPositions = 512;
constexpr float kEpsilon = 1e-6f;

// Norm, rotation and a paged cache in one call: K and V go to slots of blocks of 16, Q to q_out.
int64_t CheckRotationAndCache(const ffi::Function& rope_cache, const std::vector<uint16_t>& qkv,
                              const std::vector<float>& qk_var, const std::vector<float>& gamma_q,
                              const std::vector<float>& gamma_k) {
  constexpr int64_t kBlocks = 4, kBlockSize = 16, kHeads = kKCols / kHeadDim;
  constexpr int64_t kSlot = kHeads * kHeadDim, kBlock = kBlockSize * kSlot;
  std::vector<uint16_t> q_out(kRows * kQCols), cos_sin(kPositions * kRotaryDim);
  std::vector<uint16_t> cache(2 * kBlocks * kBlock);  // a block of K, then one of V
  std::vector<int64_t> positions(kRows), slots(kRows);
  for (int64_t p = 0; p < kPositions; ++p) {
    uint16_t* turn = &cos_sin[p * kRotaryDim];
    for (int64_t i = 0; i < kRotaryDim / 2; ++i) {
      double share = static_cast<double>(2 * i) / kRotaryDim;
      double angle = static_cast<double>(p) * std::pow(10000.0, -share);
      turn[i] = ToBFloat16(static_cast<float>(std::cos(angle)));
      turn[kRotaryDim / 2 + i] = ToBFloat16(static_cast<float>(std::sin(angle)));
    }
  }
  for (int64_t row = 0; row < kRows; ++row) {
    positions[row] = row * 13 % kPositions;
    slots[row] = row % 7 == 3 ? -1 : row * 11 % (kBlocks * kBlockSize);  // a negative one: nowhere
  }

  auto input = [](const auto& values) {
    return const_cast<void*>(static_cast<const void*>(values.data()));
  };
  auto* base = static_cast<uint16_t*>(input(qkv));
  View q(base, kBFloat16, {kRows, kQCols}, {kWidth, 1});
  View k(base + kQCols, kBFloat16, {kRows, kKCols}, {kWidth, 1});
  View v(base + kQCols + kKCols, kBFloat16, {kRows, kKCols}, {kWidth, 1});
  View var(input(qk_var), kFloat32, {kRows, 2}, {2, 1});
  View scale_q(input(gamma_q), kFloat32, {kQCols}, {1});
  View scale_k(input(gamma_k), kFloat32, {kKCols}, {1});
  View out_q(q_out.data(), kBFloat16, {kRows, kQCols}, {kQCols, 1});
  View angles(cos_sin.data(), kBFloat16, {kPositions, kRotaryDim}, {kRotaryDim, 1});
  View at(positions.data(), kInt64, {kRows}, {1});
  View to(slots.data(), kInt64, {kRows}, {1});
  const std::vector<int64_t> shape{kBlocks, kBlockSize, kHeads, kHeadDim};
  const std::vector<int64_t> strides{2 * kBlock, kSlot, kHeadDim, 1};
  View k_cache(cache.data(), kBFloat16, shape, strides);
  View v_cache(cache.data() + kBlock, kBFloat16, shape, strides);
  // What is not given is None: no K beside its cache, no scales of a float8 cache.
  rope_cache(ffi::TensorView(out_q), nullptr, ffi::TensorView(k_cache), ffi::TensorView(v_cache),
             ffi::TensorView(scale_q), ffi::TensorView(scale_k), ffi::TensorView(var),
             ffi::TensorView(q), ffi::TensorView(k), ffi::TensorView(v), ffi::TensorView(at),
             ffi::TensorView(angles), ffi::TensorView(to), nullptr, nullptr, kEpsilon);

  int64_t wrong = 0;
  std::vector<uint16_t> expected(cache.size());
  for (int64_t row = 0; row < kRows; ++row) {
    const uint16_t* x = &qkv[row * kWidth];
    const uint16_t* turn = &cos_sin[positions[row] * kRotaryDim];
    auto head = [&](int64_t first, int64_t column, const std::vector<float>& gamma) {
      std::vector<uint16_t> y(kHeadDim);
      for (int64_t c = 0; c < kHeadDim; ++c) {
        float scale = gamma[first - column * kQCols + c];
        y[c] = Expected(x[first + c], qk_var[row * 2 + column], scale, kEpsilon);
      }
      return Rotated(std::move(y), turn, kRotaryDim);
    };
    for (int64_t first = 0; first < kQCols; first += kHeadDim) {
      auto y = head(first, 0, gamma_q);
      for (int64_t c = 0; c < kHeadDim; ++c) wrong += q_out[row * kQCols + first + c] != y[c];
    }
    if (slots[row] < 0) continue;
    int64_t block = slots[row] / kBlockSize, offset = slots[row] % kBlockSize;
    uint16_t* slot = &expected[block * 2 * kBlock + offset * kSlot];
    for (int64_t first = 0; first < kKCols; first += kHeadDim) {
      auto y = head(kQCols + first, 1, gamma_k);
      std::copy(y.begin(), y.end(), slot + first);
    }
    std::copy_n(x + kQCols + kKCols, kKCols, slot + kBlock);
  }
  for (size_t i = 0; i < cache.size(); ++i) wrong += cache[i] != expected[i];
  std::printf("%lld of %lld elements differ, rotated and stored\n", static_cast<long long>(wrong),
              static_cast<long long>(q_out.size() + cache.size()));
  return wrong;
}

int Run(const char* path) {
  // What a projection leaves: Q, K and V side by side in one buffer.
  std::vector<uint16_t> qkv(kRows * kWidth), q_out(kRows * kQCols), k_out(kRows * kKCols);
  std::vector<float> qk_var(kRows * 2), gamma_q(kQCols), gamma_k(kKCols);
  uint32_t state = 1;
  for (uint16_t& x : qkv) x = ToBFloat16(static_cast<int32_t>(NextRandom(&state)) * 0x1p-30f);
  for (float& v : qk_var) v = static_cast<float>(NextRandom(&state) >> 8) * 0x1p-24f;
  for (float& g : gamma_q) g = static_cast<float>(NextRandom(&state) >> 8) * 0x1p-23f;
  for (float& g : gamma_k) g = static_cast<float>(NextRandom(&state) >> 8) * 0x1p-23f;

  ffi::Module module = ffi::Module::LoadFromFile(path);
  ffi::Function apply = module->GetFunction("apply_qk_rms_norm").value();

  View q(qkv.data(), kBFloat16, {kRows, kQCols}, {kWidth, 1});
  View k(qkv.data() + kQCols, kBFloat16, {kRows, kKCols}, {kWidth, 1});
  View var(qk_var.data(), kFloat32, {kRows, 2}, {2, 1});
  View scale_q(gamma_q.data(), kFloat32, {kQCols}, {1});
  View scale_k(gamma_k.data(), kFloat32, {kKCols}, {1});
  View out_q(q_out.data(), kBFloat16, {kRows, kQCols}, {kQCols, 1});
  View out_k(k_out.data(), kBFloat16, {kRows, kKCols}, {kKCols, 1});
  apply(ffi::TensorView(out_q), ffi::TensorView(out_k), ffi::TensorView(scale_q),
        ffi::TensorView(scale_k), ffi::TensorView(var), ffi::TensorView(q), ffi::TensorView(k),
        kEpsilon);

  int64_t wrong = 0;
  for (int64_t row = 0; row < kRows; ++row) {
    const uint16_t* x = &qkv[row * kWidth];
    for (int64_t c = 0; c < kQCols; ++c) {
      wrong += q_out[row * kQCols + c] != Expected(x[c], qk_var[row * 2], gamma_q[c], kEpsilon);
    }
    for (int64_t c = 0; c < kKCols; ++c) {
      wrong += k_out[row * kKCols + c] !=
               Expected(x[kQCols + c], qk_var[row * 2 + 1], gamma_k[c], kEpsilon);
    }
  }
  std::printf("%lld of %lld elements differ\n", static_cast<long long>(wrong),
              static_cast<long long>(kRows * (kQCols + kKCols)));

  // A module holds what was exported to it.
  if (auto rope_cache = module->GetFunction("qk_rms_norm_rope_cache")) {
    wrong += CheckRotationAndCache(rope_cache.value(), qkv, qk_var, gamma_q, gamma_k);
  }

  // A mistake is an exception that says what is wrong; nothing has been written.
  View short_gamma(gamma_q.data(), kFloat32, {kQCols - 1}, {1});
  try {
    apply(ffi::TensorView(out_q), ffi::TensorView(out_k), ffi::TensorView(short_gamma),
          ffi::TensorView(scale_k), ffi::TensorView(var), ffi::TensorView(q), ffi::TensorView(k),
          kEpsilon);
    std::printf("a wrong shape was accepted\n");
    return 1;
  } catch (const ffi::Error& error) {
    std::printf("caught %s: %s\n", error.kind().c_str(), error.message().c_str());
  }
  return wrong == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s MODULE.so\n", argv[0]);
    return 2;
  }
  try {
    return Run(argv[1]);
  } catch (const ffi::Error& error) {
    std::fprintf(stderr, "%s: %s\n", error.kind().c_str(), error.message().c_str());
    return 1;
  }
}
