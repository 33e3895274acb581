"""Compare the whole vocabulary with the answer options of a question. See docs/paper.md."""

from prunescope.paper import scripts

if __name__ == "__main__":
    scripts.run(scripts.compare_options)
