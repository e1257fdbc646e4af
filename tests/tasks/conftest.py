from importlib.util import find_spec

# The harness is an extra; what holds without it is in test_lm_eval_config.py.
collect_ignore = [] if find_spec("lm_eval") and find_spec("accelerate") else ["test_lm_eval.py"]
