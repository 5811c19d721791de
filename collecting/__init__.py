"""What collect_candidates.py is made of; PRO's bootstrapping and evaluating/ use it too.

The verbs, a module each: prepare, sample, teacher, flip, anchor, rank; hindsight and export in export.py.
The rankers behind rank --by: rank_labels, rank_similarity, rank_asked (gpt), rank_contextual, rank_likelihood (logprob,
probabilistic, prm), reward_models (reward).
Below them: journal (files that survive a kill), prompts (the templates), flags, generation (a model on this machine),
server (one elsewhere), asking (either), scoring (likelihoods), answers (what an answer says).
"""
