"""Others who do the same, each used as its own documentation would."""
