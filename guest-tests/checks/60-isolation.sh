# The host orders a function behind the IOMMU to reach where the guest never let it, or no longer lets it.
. /lib.sh
names="never-mapped never-mapped-logged unmapped unmapped-logged page-unchanged"
need_disk $((64 * MIB)) $names
FAULT_SECONDS=5
plan 5

# What the answer names must be in the kernel's log within seconds. The log check later sets these faults aside.
logged() { # name mark
	local device iova text
	device=$(field device)
	iova=$(field iova)
	text=$(guest log-wait /dev/kmsg "$2" "$device" "$iova" $FAULT_SECONDS)
	outcome $? "$1" "$text"
	echo "$device $iova" >>/run/faults-ordered
}

mark=$(guest log-mark /dev/kmsg)
ask isolation-never-mapped nvme="$NVME"
status=$?
outcome $status never-mapped "$(field text)"
if [ $status -eq 0 ]; then
	logged never-mapped-logged "$mark"
else
	skip never-mapped-logged "no DMA was made"
fi

# One page of the disk is read into a page that we keep; its mapping ended with the transfer.
mark=$(guest log-mark /dev/kmsg)
: >/run/answer
held=$(guest held-page "$DISK" $((32 * MIB)) sh /ask-unmapped.sh)
status=$?
if read -r asked_status answer </run/answer; then
	outcome "$asked_status" unmapped "$(field text)"
else
	asked_status=3
	fail unmapped "status $status: $held"
fi
if [ "$asked_status" -eq 0 ]; then
	logged unmapped-logged "$mark"
	outcome $status page-unchanged "${held:-the page that was read into is as it was}"
else
	skip unmapped-logged "no DMA was made"
	skip page-unchanged "no DMA was made"
fi
finish
