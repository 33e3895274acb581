"""Compare two models step by step while they write. See docs/paper.md."""

from prunescope.paper import scripts

if __name__ == "__main__":
    scripts.run(scripts.compare_generation)
