# Shared by the scripts of the nodes that are of no use without the head. They have to set head_ip.
head_port=6379

# A connection that is dropped rather than refused would hang for minutes, and Bash would not act on a signal
# meanwhile: each try has its own time, in the background.
try_head() {
    timeout "$1" bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$head_ip" "$head_port" >/dev/null 2>&1
}
head_listens() {
    try_head 2 &
    wait $!
}

# Wait until the head listens; fail, and say so, where it does not come to do so in time.
await_head() {
    local seconds="${RAYDOG_HEAD_WAIT_SECONDS:-600}"
    local deadline=$((SECONDS + seconds))
    until head_listens; do
        if [ "$SECONDS" -ge "$deadline" ]; then
            echo "The Ray head at $head_ip port $head_port did not listen within $seconds s:" \
                "look at the head node's task, and at the network between the two nodes" >&2
            return 1
        fi
        sleep 0.2
    done
}

# Look until there is a reason for the node to leave, and say it: the head is gone, or the rest of the arguments,
# a command that is run with every look, succeeds. It fails where the process of the first argument ends before.
watch_head() {
    local limit="${RAYDOG_HEAD_GONE_SECONDS:-60}" heard=$SECONDS refused=0
    local pause=$((limit < 4 ? 1 : limit < 20 ? limit / 4 : 5))
    # Waiting for a line that never comes needs no process that could be left behind.
    exec 9<> <(:)
    while kill -0 "$1" 2>/dev/null; do
        read -rt "$pause" -u 9
        if try_head 5; then
            heard=$SECONDS refused=0
        else
            refused=$((refused + 1))
        fi
        # One look is not enough: the clock may be set.
        if [ "$refused" -ge 2 ] && [ $((SECONDS - heard)) -ge "$limit" ]; then
            echo "This node leaves: the Ray head at $head_ip port $head_port has not accepted a connection" \
                "for $((SECONDS - heard)) s" >&2
            return 0
        fi
        ! "${@:2}" || return 0
    done
    return 1
}
