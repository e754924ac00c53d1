"""`python -m tests.helpers.hub_stand_in DATASET ROWS COMMAND …`: a bupo command for which the hub holds one data set, of these rows."""

import json
import sys

from datasets import Dataset

from bupo.cli.main import main
from bupo.data import problems

if __name__ == "__main__":
    name, rows, *command = sys.argv[1:]
    hub = {name: Dataset.from_list(json.loads(rows))}
    problems.load_dataset = lambda wanted, *args, **kwargs: hub[wanted]
    sys.exit(main(command))
