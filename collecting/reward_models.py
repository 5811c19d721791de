"""Reward models (PRO)."""

import functools
import importlib
import re

import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXModel,
    GPTNeoXPreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import common
from collecting import scoring
from collecting.prompts import render_chat
from common import UserError


class RewardModelConfig(GPTNeoXConfig):
    """`gpt_neox_reward_model`: OpenAssistant's reward models, the two of PRO. pooling: "last" or "mean"."""

    model_type = "gpt_neox_reward_model"
    pooling: str = "last"


class RewardModel(GPTNeoXPreTrainedModel):
    """GPT-NeoX with a linear layer on the last token's state, or on the mean of the states."""

    config_class = RewardModelConfig

    def __init__(self, config):
        super().__init__(config)
        self.gpt_neox = GPTNeoXModel(config)
        self.out_proj = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()

    @property
    def score(self):
        return self.out_proj  # by the name that transformers' own classes give it

    def forward(self, input_ids, attention_mask):
        states = self.gpt_neox(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state  # [B, L, H]
        weights = attention_mask.to(states.dtype)  # padded right
        if self.config.pooling == "last":
            weights = F.one_hot(attention_mask.sum(-1) - 1, attention_mask.shape[1]).to(states.dtype)
        pooled = (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        return SequenceClassifierOutput(logits=self.out_proj(pooled))  # [B, 1]


AutoConfig.register(RewardModelConfig.model_type, RewardModelConfig)
AutoModelForSequenceClassification.register(RewardModelConfig, RewardModel)
TRAIN_REWARD_MODEL = "OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5"  # of PRO's training data; evaluation: the 6.9B
REWARD_TOKENS = 1024  # of a dialogue, whoever asks, as released: 512 for one use and 1,024 for another are two scales


@functools.cache
def analyzer(module, name):
    """The analyzer of a package that one rule alone needs."""
    try:
        return getattr(importlib.import_module(module), name)()
    except ImportError:
        raise UserError(f"this reward needs a package: pip install {module.partition('.')[0]}") from None


def vader(text):
    """4 x the mean over sentences of VADER's compound: long responses do not score higher, and gaps are wide."""
    score = analyzer("vaderSentiment.vaderSentiment", "SentimentIntensityAnalyzer").polarity_scores
    sentences = re.split(r"(?<=[.!?])\s+|\n+", text.strip())
    return 4 * sum(score(s)["compound"] for s in sentences) / len(sentences)


def afinn(text):
    """AFINN's points per ten words: another lexicon, to measure what was trained with the first."""
    return 10 * analyzer("afinn", "Afinn").score(text) / max(1, len(text.split()))


RULES = {"vader": vader, "afinn": afinn}  # rewards that are a rule, by what --reward_model says


@functools.cache
def load_reward_model(name, device, flag, allow_pickle):
    """-> (model, tokenizer, the form of dialogue it expects). A sequence classifier with one output, on `device`, in
    float32 as released: bf16 has ties."""
    model, info = common.load_pretrained(
        AutoModelForSequenceClassification, name, flag, allow_pickle, dtype=torch.float32, output_loading_info=True
    )
    if getattr(model.config, "num_labels", 1) != 1 and not isinstance(model, RewardModel) or info["missing_keys"]:
        raise UserError(f"{flag} {name}: not a reward model (a sequence classifier with one output is wanted)")
    tokenizer = common.load_tokenizer(name, flag, model)
    form = "oasst" if isinstance(model, RewardModel) else "chat_template" if tokenizer.chat_template else "plain"
    return model.to(device).eval(), tokenizer, getattr(model.config, "dialogue_form", form)


def dialogue_ids(tokenizer, record, candidate, form, max_length=REWARD_TOKENS):
    """A record's dialogue and a response as the reward model was trained to read them -> at most max_length token ids;
    the dialogue's beginning goes first. form: "plain", "oasst" or "chat_template".

    plain: what common.encode gives the training scripts. Records without `messages` are one user's turn, the prompt.
    """
    if form == "plain":
        encoded = common.encode(tokenizer, record | {"candidates": [candidate]}, max_length)
        return encoded.prompt_ids + encoded.responses[0]
    messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
    messages = [*messages, {"role": "assistant", "content": candidate["text"]}]
    if form == "chat_template":
        text = render_chat(tokenizer, messages)
    else:
        marks = {"user": "<|prompter|>", "assistant": "<|assistant|>", "system": "<|system|>"}
        text = "".join(marks[m["role"]] + m["content"] + tokenizer.eos_token for m in messages)
    return common.cut_left(tokenizer, tokenizer(text, add_special_tokens=False).input_ids, max_length)


def reward_logits(name, device, pairs, *, flag="--reward_model", allow_pickle=False):
    """Raw logits of the reward model `name` for pairs (record, candidate) -> floats: every reward of the project.
    A name in RULES is a rule, which reads the response alone."""
    if name in RULES:
        return [float(RULES[name](candidate["text"])) for _, candidate in pairs]
    model, tokenizer, form = load_reward_model(name, device, flag, allow_pickle)
    limit = min(REWARD_TOKENS, getattr(model.config, "max_position_embeddings", REWARD_TOKENS))
    return score_dialogues(model, [dialogue_ids(tokenizer, r, c, form, limit) for r, c in pairs]).tolist()


def score_dialogues(model, dialogues):
    """dialogues, lists of token ids -> [N], float32: the logit that the model's own forward gives each by itself."""
    pad = None if isinstance(model, RewardModel) else model.config.get_text_config().pad_token_id
    sequences = []
    for ids in dialogues:
        end = max(i for i, token in enumerate(ids) if token != pad or i == 0)  # what transformers' classes look at
        sequences.append(common.Encoded(None, ids[:end], [ids[end : end + 1]], 0, 0))

    def values_of(batch):
        if batch.position_ids is None:
            return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0].float()
        inputs = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids, "use_cache": False}
        states = model.base_model(batch.input_ids, **inputs).last_hidden_state[0]  # [T, H]
        return model.score(states[batch.last_positions])[:, 0].float()

    def check(some):
        if not hasattr(model, "score"):
            raise UserError("its head does not read the last token's state")
        alone = torch.cat([values_of(common.pack_padded([s]).to(model.device)) for s in some])
        gap = ((values_of(common.pack_for(model, some)) - alone).abs().max() / alone.abs().max()).item()
        if not gap <= 1e-3:
            raise UserError(f"packed and single sequences differ by {gap:.2g}")

    return scoring.score_rows(model, sequences, values_of, check)
