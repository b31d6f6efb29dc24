"""qknorm_tvm inside other people's models; each module needs the framework that it is named for."""
