# The same rows as a file, one command; the plan would choose the sizes, they are given to be equal to the others'.
meft-bench train --data facts.jsonl --output adapter --neurons 96 --kept 8 --option experts=16 --option probed=4 \
  --learning-rate 1e-2 --steps "$COMPARISON_STEPS" --batch-size 64 --accumulation 1 --eval-share 0 --eval-rows 1 --seed "$COMPARISON_SEED"
