"""Caching methods side by side on a diffusers pipeline: the published benchmark command.

python -m adacorr.bench --model_type flux --cache_methods None Fast Tea "Fast+AdaCorrection" --num_inference_steps 30
python -m adacorr.bench --model_type sd3 --tiny          # small random weights: nothing is downloaded
"""

import sys

from adacorr.integrations.diffusers.bench import main

if __name__ == "__main__":
    sys.exit(main())
