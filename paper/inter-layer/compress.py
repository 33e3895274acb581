"""Drop sublayers or blocks, with the flags of LLM-Drop. See docs/paper.md."""

from prunescope import paper

if __name__ == "__main__":
    paper.run(paper.drop_layers)
