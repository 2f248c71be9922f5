#!/bin/sh
# Stops the campaigns of these run directories and returns when each has written its checkpoint: what a pod does before it
# ends. One that does not run, or that another pod has stopped already, is waited for in the same way.
#   deploy/stop_and_wait.sh RUN_DIR...
for run in "$@"; do
    understudy stop "$run" || true
    while understudy status "$run" --json | grep -Eq '"state": "(running|paused)"'; do sleep 2; done
done
