"""python -m ff_lightning: the command ff-lightning."""

from ff_lightning.commands.start import main

if __name__ == "__main__":
    main()
