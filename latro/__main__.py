import sys

from latro.cli import main

sys.exit(main())
