#!/bin/sh
# Nothing in the image runs as root, whoever starts it, and however.
if [ "$(id -u)" = 0 ]; then
    echo "dtrain: nothing trains as root: name another user (docker run --user 1000, RUN_AS=1000), whose the outputs are" >&2
    exit 2
fi
exec "$@"
