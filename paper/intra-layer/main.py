"""Prune weights, with the flags of the Wanda code. See docs/paper.md."""

from prunescope import paper

if __name__ == "__main__":
    paper.run(paper.prune_weights)
