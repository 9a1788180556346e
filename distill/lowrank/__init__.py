"""Students whose matrices are low rank plus sparse while they train, and ordinary again when they are done."""
