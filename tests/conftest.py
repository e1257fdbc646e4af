"""Its place makes the helper modules of this folder importable by every test below it."""
