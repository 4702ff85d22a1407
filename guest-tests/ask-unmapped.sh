# Run by held-page while it holds the page: asks, and leaves the answer for the check.
. /lib.sh
ask isolation-unmapped nvme="$NVME" offset="$HELD_OFFSET" length="$HELD_LENGTH" gpa="$HELD_GPA"
echo "$? $answer" >/run/answer
