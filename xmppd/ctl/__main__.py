import sys

from xmppd.ctl.main import main

sys.exit(main())
