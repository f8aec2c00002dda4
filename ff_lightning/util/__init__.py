"""What all parts use: checks of arguments, files, memory."""
