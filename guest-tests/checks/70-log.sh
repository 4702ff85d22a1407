# The kernel's log after everything else: no fault but those ordered, no trouble of NVMe, of the IOMMU or of the kernel.
. /lib.sh
plan 4

only() { # name pattern...: passes if no line of the log matches
	name=$1
	lines=$(grep -E "$2" /run/dmesg | head -n 3)
	if [ -z "$lines" ]; then
		pass "$name"
	else
		echo "$lines" | while read -r line; do diag "$line"; done
		fail "$name" "$(echo "$lines" | head -n 1)"
	fi
}

dmesg >/run/dmesg
: >>/run/faults-ordered
# A fault is one of those ordered if it has that device and that address; the rest is nobody's wish.
grep -E 'Event logged \[|DMAR: .*fault' /run/dmesg >/run/faults
while read -r device iova; do
	address=${iova#0x}
	grep -vE "($device: AMD-Vi|device=$device ).*address=0x0*$address " /run/faults >/run/faults-left
	mv /run/faults-left /run/faults
done </run/faults-ordered
if [ -s /run/faults ]; then
	head -n 5 /run/faults | while read -r line; do diag "$line"; done
	fail faults "$(wc -l </run/faults) not ordered, the first: $(head -n 1 /run/faults)"
else
	pass faults "$(wc -l </run/faults-ordered) ordered, no other"
fi
only iommu-commands 'Completion-Wait loop timed out|COMMAND_HARDWARE_ERROR|ILLEGAL_COMMAND|ILLEGAL_DEV_TABLE|IOTLB_INV_TIMEOUT'
only nvme 'nvme.*(timeout|timed out|[Ee]rror|failed|reset|Abort|not ready|Removing)|I/O error|EXT4-fs (error|warning)|Buffer I/O'
only kernel 'BUG:|Oops|WARNING:|Call Trace|general protection|hung task|rcu.*stall|Kernel panic|irq [0-9]+: nobody cared'
finish
