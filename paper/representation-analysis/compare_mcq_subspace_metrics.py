"""Compare the whole vocabulary with the answer options of a question. See docs/paper.md."""

from prunescope import paper

if __name__ == "__main__":
    paper.run(paper.compare_options)
