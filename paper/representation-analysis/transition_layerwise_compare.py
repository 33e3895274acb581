"""Compare every dropped or pruned sublayer with the dense one in the same context. See docs/paper.md."""

from prunescope import paper

if __name__ == "__main__":
    paper.run(paper.compare_layers)
