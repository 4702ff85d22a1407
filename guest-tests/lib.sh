# Shared by init and the checks: results in KTAP version 1 (one level down), the conversation with the host, the device under test.
# File descriptor 3 goes to the host, 4 comes from it.

STATE=${STATE:-/run} # elsewhere in a test of this file
total=0 failed=0 skipped=0

say() { echo "vioasid: $*" >&3; }

# A result's text may hold neither a line end nor the '#' that begins a directive, and the host bounds its length.
# In the shell itself, by way of $tidied: a process costs a hundredth of a second here.
line_end='
'
tidy() {
	tidied=${*//"$line_end"/ }
	tidied=${tidied//#/.}
	tidied=${tidied:0:500}
}

plan() { printf '  KTAP version 1\n  1..%d\n' "$1" >&3; }
diag() {
	tidy "$@"
	echo "  # $tidied" >&3
}
result() { # "ok" or "not ok", name, directive, text
	total=$((total + 1))
	tidy "$3$4"
	echo "  $1 $total $2${tidied:+ # $tidied}" >&3
}
pass() { result ok "$1" "" "$2"; } # name [note]
fail() {                           # name reason
	failed=$((failed + 1))
	result "not ok" "$1" "" "$2"
}
skip() { # name reason
	skipped=$((skipped + 1))
	result ok "$1" "SKIP " "$2"
}
outcome() { # status name text: a program's exit code as a result
	case $1 in
	0) pass "$2" "$3" ;;
	4) skip "$2" "$3" ;;
	1) fail "$2" "$3" ;;
	*) fail "$2" "status $1: $3" ;;
	esac
}
finish() { # ends a check's file with the status that init turns into a result
	[ $failed -gt 0 ] && exit 1
	[ $total -gt 0 ] && [ $skipped -eq $total ] && exit 4
	exit 0
}
skip_all() { # reason, names...: every result of the file
	reason=$1
	shift
	plan $#
	for each; do skip "$each" "$reason"; done
	finish
}

fact() { # key value: for the host's report
	tidy "$2"
	say "fact key=$1 text=$tidied"
}

# ask QUESTION [key=value...]: sets $answer; status 0 ok, 1 the host's "fail", 4 its "skip", 3 no answer.
# Questions are numbered through all checks of a boot, so that a late answer is never taken for another's.
ASK_SECONDS=30
ask() {
	local asked question word rest
	if [ -z "$HOST" ]; then
		answer="status=skip text=there is no host to ask"
		return 4
	fi
	asked=$(($(cat "$STATE/asked" 2>/dev/null || echo 0) + 1))
	echo $asked >"$STATE/asked"
	question=$1
	shift
	say "ask number=$asked question=$question $*"
	answer=
	while read -r -t $ASK_SECONDS word rest <&4; do
		[ "$word" = "vioasid:" ] || continue
		case $rest in
		"answer number=$asked status="*) answer=${rest#"answer number=$asked "} ;;
		*) continue ;;
		esac
		case $(field status) in
		ok) return 0 ;;
		fail) return 1 ;;
		skip) return 4 ;;
		esac
		return 3
	done
	answer="status=none text=the host gave no answer in $ASK_SECONDS seconds"
	return 3
}
field() { # key: its value in $answer; text is the rest of the line
	local word
	[ "$1" = text ] && case $answer in *text=*) echo "${answer#*text=}" && return ;; *) return ;; esac
	for word in ${answer%%text=*}; do
		case $word in "$1="*) echo "${word#*=}" && return ;; esac
	done
}

# The NVMe function under test: NVME (its BDF), NVME_SYSFS, DISK (its first namespace) and DISK_BYTES; empty where there is none.
find_nvme() { # tenths of a second to wait for it
	waited=0
	while :; do
		for block in /sys/class/block/nvme*n1; do
			[ -e "$block" ] || continue
			device=$(readlink -f "$block/device/device")
			[ -n "$NVME" ] && [ "${device##*/}" != "$NVME" ] && continue
			export NVME=${device##*/} NVME_SYSFS=$device DISK=/dev/${block##*/} DISK_SYSFS=$block
			export DISK_BYTES=$(($(cat "$block/size") * 512))
			[ -b "$DISK" ] && return 0
		done
		waited=$((waited + 1))
		[ $waited -gt "$1" ] && return 1
		sleep 0.1
	done
}
need_disk() { # bytes, names...: skips the whole file where the disk does not reach so far
	bytes=$1
	shift
	[ -n "$DISK" ] || skip_all "no NVMe namespace was found" "$@"
	[ "$DISK_BYTES" -ge "$bytes" ] || skip_all "the disk has $DISK_BYTES bytes, this needs $bytes" "$@"
}
MIB=1048576
