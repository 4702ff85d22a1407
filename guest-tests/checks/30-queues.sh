# Transfers of many sizes at several queue depths, on every CPU's own queue at once.
. /lib.sh
block=$(cat "$DISK_SYSFS/queue/logical_block_size" 2>/dev/null || echo 512)
# depth size count
shapes="1:4096:64 8:$block:128 32:4096:512 32:$((3 * block)):64 8:131072:64 4:1048576:8"
each=$((9 * MIB)) # above the longest of the shapes
cpus=$(nproc)
[ "$cpus" -gt 4 ] && cpus=4
start=$((64 * MIB))
names=
for shape in $shapes; do
	IFS=: read -r depth size count <<END
$shape
END
	names="$names depth-$depth-size-$size"
done
need_disk $((start + cpus * each)) $names
set -- $names
plan $#

for shape in $shapes; do
	IFS=: read -r depth size count <<END
$shape
END
	cpu=0
	while [ $cpu -lt "$cpus" ]; do
		(
			taskset -c $cpu guest queues "$DISK" $((start + cpu * each)) "$depth" "$size" "$count" >/run/queue-$cpu
			echo $? >/run/queue-$cpu.status
		) &
		cpu=$((cpu + 1))
	done
	wait
	worst=0 said= cpu=0
	while [ $cpu -lt "$cpus" ]; do
		status=$(cat /run/queue-$cpu.status)
		if [ $worst -eq 0 ]; then
			worst=$status
			said=$(cat /run/queue-$cpu)
		fi
		cpu=$((cpu + 1))
	done
	[ "$cpus" -gt 1 ] && said="$said, on each of $cpus CPUs"
	outcome "$worst" "$1" "$said"
	shift
done
finish
