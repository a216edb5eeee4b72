"""What opens: every architecture that can be built tiny, probed and compared with its own dense float64 pass.

python -m benchmarks.models                  measure what results.jsonl lacks, and write docs/models.md
python -m benchmarks.models llama t5 …       measure these anew
python -m benchmarks.models --all            measure everything anew
python -m benchmarks.models --check          exit with 1 if docs/models.md is not what results.jsonl gives
"""
