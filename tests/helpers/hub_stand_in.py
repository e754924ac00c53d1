"""`python -m tests.helpers.hub_stand_in DATASET ROWS COMMAND …`: run a bupo command with a hub of one data set."""

import json
import sys

from datasets import Dataset

from bupo.cli.main import main
from bupo.data import problems

if __name__ == "__main__":
    name, rows, *command = sys.argv[1:]
    hub = {name: Dataset.from_list(json.loads(rows))}
    problems.load_dataset = lambda name, *args, **kwargs: hub[name]
    sys.exit(main(command))
