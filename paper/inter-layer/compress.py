"""Drop sublayers or blocks, with the flags of LLM-Drop. See docs/paper.md."""

from prunescope.paper import scripts

if __name__ == "__main__":
    scripts.run(scripts.drop_layers)
