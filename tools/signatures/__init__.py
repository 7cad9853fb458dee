"""Signature files: what releases of vLLM and Triton have of the names that our source needs.

python -m tools.signatures vllm 0.33.1   read a release's wheel, write its file, say what is wrong
python -m tools.signatures triton        the same for every release that has a file
python -m tools.signatures tables        write README's tables of tested versions from the files

Wheels are read, not installed, and fetched by `pip download`, 200 to 350 MB each; `--wheels DIR`
keeps them there. Tests need the files alone.

  walk, uses   our source -> names, calls and classes that it takes from a library
  source       a release's source -> what such a name is there
  check        both -> what does not fit
  libraries    where the files are, and what syntax alone cannot tell
  tables       README's tables
"""
