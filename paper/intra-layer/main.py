"""Prune weights, with the flags of the Wanda code. See docs/paper.md."""

from prunescope.paper import scripts

if __name__ == "__main__":
    scripts.run(scripts.prune_weights)
