/* Only FuseShim's C files use libfuse; this header exists so that the package manager finds its flags. */
