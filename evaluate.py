"""Evaluate models: every verb writes its predictions (JSONL) to runs/eval/NAME/VERB.jsonl and its figures to
VERB.metrics.json beside it.

    ranking   does the model rank a candidates file's responses as their annotations do: pair accuracy, Kendall's tau
    nli       generate answers to NLI prompts: accuracy, confusion matrix, share unparsed
    multidoc-qa   answer questions from several documents: accuracy by the place of the one that has the answer
    nll       token NLL of the reference responses (Tuna App. A chooses beta by it)
    superni   Super-NaturalInstructions from a clone: ROUGE-L and exact match
    lmentry   LMentry from a clone, scored by its own scorers: accuracy, robustness, LMentry score
    vicuna    answer Vicuna's 80 questions
    hh        answer HH-RLHF's dialogues: BLEU and the reward under a reward model (PRO, Table 2)
    judge     two systems' answers compared by a stronger model, in both orders
    sheet     a page for people to compare systems blindly, and the score of what they said
    report    several NAMEs side by side as Markdown, and RESCUE's figures as PNG

Nothing is generated twice: killed and run again with the same arguments, a verb goes on from its predictions.
NAME is --name, else the model's folder (runs/rescue-label/model is rescue-label). Under torchrun prompts are shared
over processes.

    python evaluate.py nli --model runs/rescue-label/model --input data/esnli/test.jsonl
    python evaluate.py report rescue-none rescue-label
    python evaluate.py judge --answers runs/eval/tuna/vicuna.jsonl runs/eval/tuna-sft/vicuna.jsonl --model gpt-4 \\
        --base_url https://api.openai.com/v1

recipes/README.md has a command of every verb.
"""

import common
from collecting.flags import run_verb
from evaluating.hh import hh, hh_flags
from evaluating.judge import judge, judge_flags
from evaluating.likelihood import nll, nll_flags, ranking, ranking_flags
from evaluating.lmentry import lmentry, lmentry_flags
from evaluating.questions import multidoc_qa, multidoc_qa_flags, nli, nli_flags, vicuna, vicuna_flags
from evaluating.report import report, report_flags
from evaluating.sheet import sheet, sheet_flags
from evaluating.superni import superni, superni_flags

VERBS = {
    "ranking": (ranking_flags, ranking),
    "nli": (nli_flags, nli),
    "multidoc-qa": (multidoc_qa_flags, multidoc_qa),
    "nll": (nll_flags, nll),
    "superni": (superni_flags, superni),
    "lmentry": (lmentry_flags, lmentry),
    "vicuna": (vicuna_flags, vicuna),
    "hh": (hh_flags, hh),
    "judge": (judge_flags, judge),
    "sheet": (sheet_flags, sheet),
    "report": (report_flags, report),
}


def main():
    run_verb(VERBS, __doc__)


if __name__ == "__main__":
    common.run_cli(main)
