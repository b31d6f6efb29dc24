"""Machine code from specs: which config a spec gets, LLVM, nvcc, the C entry point, linking."""
