"""Runs the code of a Markdown page as its reader would: all Python blocks, one after the other."""

import re

from checkpoints import ROOT, SMOLLM2


def run(page, reward_model=SMOLLM2):
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert blocks, f"{page} has no code"
    names = {"__name__": "page"}
    for block in blocks:
        code = block.replace("path/to/model", str(SMOLLM2)).replace("path/to/reward-model", str(reward_model))
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + code, page, "exec"), names)
    return names
