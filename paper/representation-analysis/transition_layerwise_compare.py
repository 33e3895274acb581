"""Compare every dropped or pruned sublayer with the dense one in the same context. See docs/paper.md."""

from prunescope.paper import scripts

if __name__ == "__main__":
    scripts.run(scripts.compare_layers)
