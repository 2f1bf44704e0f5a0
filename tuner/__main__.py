"""`python -m tuner` and `accelerate launch -m tuner`: the console command without its script."""

from tuner.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
