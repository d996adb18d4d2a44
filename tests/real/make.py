"""What transformers computes in f32 from the fetched SmolLM2 (scripts/fetch_smollm2.py).

    pip install -r tests/golden/requirements.txt
    python tests/real/make.py .cache/smollm2        # writes tests/real/expected.json
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def main():
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    out = {"texts": [], "chats": [], "judge": []}
    for record in lines(HERE / "texts.jsonl"):
        ids = tokenizer(record["text"]).input_ids
        assert len(ids) >= 200, (record["id"], len(ids))
        logp = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        target = torch.tensor(ids[1:])[:, None]
        out["texts"].append({"id": record["id"], "ids": ids,
                             "logprobs": [float(f"{v:.7g}") for v in logp.gather(1, target)[:, 0].tolist()]})
    yes, no = (tokenizer(w).input_ids[0] for w in ("yes", "no"))
    for record in lines(HERE / "../../examples/prompts.jsonl"):
        ids = tokenizer.apply_chat_template(record["messages"], add_generation_prompt=True, return_dict=True)["input_ids"]
        logits = model(torch.tensor([ids])).logits[0, -1]
        out["judge"].append(float(logits[[yes, no]].softmax(0)[0]))
        tokens = model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids):]
        out["chats"].append({"id": record["id"], "prompt_ids": ids, "completion_ids": tokens.tolist(),
                             "text": tokenizer.decode(tokens, skip_special_tokens=True)})
    (HERE / "expected.json").write_text(json.dumps(out, ensure_ascii=False) + "\n")
    print([len(t["ids"]) for t in out["texts"]], [len(c["completion_ids"]) for c in out["chats"]])


if __name__ == "__main__":
    main()
