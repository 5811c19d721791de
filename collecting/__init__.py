"""What collect_candidates.py is made of; PRO's bootstrapping and evaluating/ use it too.

The verbs, a module each: prepare, sample, teacher, flip, anchor, rank; hindsight and export in export.py.
The rankers behind rank --by, a module a kind: rank_given (label, probabilistic: without a model), rank_local (logprob,
prm, reward, similarity: by a model on this machine), rank_asked (gpt, contextual: by a stronger one that is asked).
Below them: journal (files that survive a kill), prompts (their texts: templates/), flags, generation (a model on this
machine), server (one elsewhere), asking (either), scoring (likelihoods), reward_models, answers (what an answer says).
"""
