"""What counts as right: one module a lab, each a list of `@exercise` functions. All are loaded on the first check."""
