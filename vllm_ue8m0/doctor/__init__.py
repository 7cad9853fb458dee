"""`vllm-ue8m0 doctor`: what a bug report needs, and what is wrong with an installation.

facts.py       what there is: versions, GPUs, kernels, caches, environment
ask_vllm.py    what vLLM says, asked in a process of its own; what its own fp8 method would do
ask_kernels.py whether this project's kernels give here what plain torch gives: the self-test
run_cases.py   the program that it starts; cases.py has what is run
model.py       how one checkpoint would be served here
problems.py    what is wrong, and what to do: known-bad combinations, a function each
report.py      all of it, as text and as JSON

None of it needs a GPU, vLLM or Triton; what is absent is a fact. Importing this package loads
nothing.
"""
