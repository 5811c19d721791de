"""What an answer says, and whether that is right: NLI labels, and answers to questions; what is no answer."""

import re
import string

NLI_LABELS = ("entailment", "neutral", "contradiction")
KNOWN = "known"  # count[model, KNOWN] > 0: it has answered a prompt, so a refusal concerns one prompt alone


class Refusal(str):
    """Why a prompt has no answer, in the server's words, where asking again would not help."""


def without_thinking(text):
    """An answer without the thinking in <think> tags before it. The opening tag may stand in the prompt."""
    thinking, end, answer = text.partition("</think>")
    return answer if end else "" if thinking.lstrip().startswith("<think>") else text


def one_label(text):
    """The one NLI label that occurs in a text, or None."""
    found = {label for label in NLI_LABELS if re.search(rf"\b{label}\b", text.lower())}
    return found.pop() if len(found) == 1 else None


def parse_nli(text):
    """An answer to an NLI prompt -> (label or None, well-formed). Well-formed: an explanation, ####, one label and
    nothing else.

    The label stands after the first ####; only an answer without one is searched whole, and then exactly one label
    must occur in it. Backquotes around it all, as in RESCUE's released data, are let pass.
    """
    text = text.strip("` \n")
    explanation, mark, tail = text.partition("####")
    label = one_label(tail if mark else text)
    return label, bool(mark and explanation.strip() and tail.strip(" .\n").lower() in NLI_LABELS)


def normalize_answer(text):
    """Lower case without punctuation, articles, and extra white space (SQuAD's normalisation)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def has_answer(text, answers):
    """Whether any of the answers, normalised, is a substring of the text so normalised (Liu et al.'s best subspan)."""
    text = normalize_answer(text)
    return any(a and a in text for a in map(normalize_answer, answers))
