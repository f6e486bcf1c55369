"""The subcommands of `turboquant-gguf`, one module each: a parser over one library function of the same name."""
