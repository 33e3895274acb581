"""Compare two models step by step while they write. See docs/paper.md."""

from prunescope import paper

if __name__ == "__main__":
    paper.run(paper.compare_generation)
