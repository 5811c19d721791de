"""What a recipe at SCALE=tiny works on: random models of a few thousand weights, and data in the layout in which the
original files come, made from demo/nli.jsonl.

    python recipes/tiny.py FOLDER      -> FOLDER/model, FOLDER/reward-train, FOLDER/reward-eval,
                                          FOLDER/hh/SUBSET/{train,test}.jsonl.gz, FOLDER/esnli.csv, FOLDER/nq.jsonl.gz
    python recipes/tiny.py --serve FILE    a stand-in server for teachers and rankers; its URL goes to FILE,
                                           and it ends when FILE is deleted
"""

import csv
import gzip
import json
import pathlib
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

TEXT = pathlib.Path(__file__).resolve().parent.parent / "demo" / "nli.jsonl"
ROWS = [json.loads(line) for line in TEXT.read_text().splitlines()]
CONFIG = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
CONFIG |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.2}
HH_SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")


def make_tokenizer(bos=True):
    """A byte-level BPE of 400 entries: every text round-trips, nothing is unknown. With BOS it adds one, as Llama's
    does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([row["premise"] for row in ROWS], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_model(seed=0, layers=2, model_class=LlamaForCausalLM, **kwargs):
    torch.manual_seed(seed)
    return model_class(LlamaConfig(**(CONFIG | {"num_hidden_layers": layers} | kwargs)))


def make_reward_model(seed):
    model = make_model(seed, model_class=LlamaForSequenceClassification, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    return model


def hh_rows(count, start):
    """Rows as HH-RLHF has them: two dialogues with one context, of two or four turns."""
    for i in range(start, start + count):
        row, other = ROWS[i % len(ROWS)], ROWS[(i + 7) % len(ROWS)]
        context = f"\n\nHuman: {row['premise']} (number {i})\n\nAssistant:"
        if i % 2:
            context += f" {other['explanation']}\n\nHuman: {row['hypothesis']}\n\nAssistant:"
        yield {"chosen": f"{context} {row['explanation']}", "rejected": f"{context} {other['hypothesis']}"}


def esnli_rows():
    """Rows as e-SNLI's CSVs have them."""
    names = {"premise": "Sentence1", "hypothesis": "Sentence2", "label": "gold_label", "explanation": "Explanation_1"}
    return [{"pairID": f"tiny-{i}"} | {new: row[old] for old, new in names.items()} for i, row in enumerate(ROWS)]


def nq_rows(count, documents):
    """Rows as lost-in-the-middle has them: a question, its answers, and passages of which one is the gold one. The
    answer is what a random model says now and then: the sign for bytes that are no UTF-8."""
    for i, row in enumerate(ROWS[:count]):
        texts = [row["premise"], *(ROWS[(i + 5 * k) % len(ROWS)]["premise"] for k in range(1, documents))]
        passages = [{"title": f"Scene {k}", "text": text, "isgold": k == 0} for k, text in enumerate(texts)]
        yield {"question": f"what is in scene {i}", "answers": ["\ufffd"], "ctxs": passages}


def reply(prompt):
    """What the stand-in server says: a ranking, a verdict, a rewritten sentence, a label, or an NLI answer."""
    if "[A's answer]" in prompt:
        a, b = (re.search(rf"\[{x}'s answer\]\n(.*?)\n\[End of {x}", prompt, re.DOTALL)[1] for x in "AB")
        return f"The longer one. [[{'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'C'}]]"
    if "\nWork in this order" in prompt:  # rank --by contextual: its own response, then the longer ones first
        parts = re.split(r"^Response \d+:\n", prompt.partition("\nWork in this order")[0], flags=re.MULTILINE)[1:]
        order = [len(parts), *sorted(range(len(parts)), key=lambda k: -len(parts[k]))]
        scores = "".join(f"{k}: {max(0, 5 - i)} {max(0, 5 - i)} 0\n" for i, k in enumerate(order))
        return f"Type: open\nReference: it\nDuplicates: none\nScores:\n{scores}Ranking: {' > '.join(map(str, order))}"
    responses = re.findall(r"^Response (\d+):", prompt, re.MULTILINE)
    if responses:
        return " > ".join(reversed(responses))
    if "opposite meaning" in prompt:
        return f"It is not true that {prompt.partition(': ')[2]}"
    return "Neutral" if "one word" in prompt else "It may be so or not. #### Neutral"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": reply(body["messages"][-1]["content"])}
        content = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}] * body.get("n", 1)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def serve(file):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url, server.timeout = pathlib.Path(file), 0.5
    url.write_text(f"http://127.0.0.1:{server.server_port}/v1")
    while url.exists():
        server.handle_request()


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def write_alpaca(folder, rows=12):
    """What Tuna's recipes read, in the layouts of Alpaca, LIMA, Vicuna's questions, and a clone of Super-NI."""
    alpaca = [{"instruction": r["premise"], "input": "", "output": r["explanation"]} for r in ROWS[:rows]]
    (folder / "alpaca_data.json").write_text(json.dumps(alpaca))
    lima = [{"conversations": [r["hypothesis"], r["explanation"]], "source": "tiny"} for r in ROWS[:3]]
    write_jsonl(folder / "lima.jsonl", lima)
    questions = [{"question_id": i, "category": "tiny", "turns": [r["hypothesis"]]} for i, r in enumerate(ROWS[:2])]
    write_jsonl(folder / "question.jsonl", questions)
    examples = [{"input": r["premise"], "output": r["label"]} for r in ROWS[:5]]
    task = {"Definition": ["Say it."], "Positive Examples": examples[:2], "Instances": examples[2:]}
    write_jsonl(folder / "superni/tasks/task1_say.json", [task])
    (folder / "superni/splits/default").mkdir(parents=True)
    (folder / "superni/splits/default/test_tasks.txt").write_text("task1_say\n")


def main():
    if sys.argv[1] == "--serve":
        return serve(sys.argv[2])
    folder = pathlib.Path(sys.argv[1])
    models = {"model": make_model(), "reward-train": make_reward_model(1), "reward-eval": make_reward_model(2)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    for k, subset in enumerate(HH_SUBSETS):
        write_jsonl(folder / f"hh/{subset}/train.jsonl.gz", hh_rows(6, 100 * k))
        write_jsonl(folder / f"hh/{subset}/test.jsonl.gz", hh_rows(4, 100 * k + 10))
    write_alpaca(folder)
    write_jsonl(folder / "nq.jsonl.gz", nq_rows(12, 10))
    with open(folder / "esnli.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["pairID", "gold_label", "Sentence1", "Sentence2", "Explanation_1"])
        writer.writeheader()
        writer.writerows(esnli_rows())


if __name__ == "__main__":
    main()
