"""The command line, ``qknorm-tvm``: one module a command."""
