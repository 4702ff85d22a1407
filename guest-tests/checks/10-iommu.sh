# The IOMMU as the guest's kernel sees it, and the NVMe function behind it.
. /lib.sh
plan 4

while read -r line; do diag "$line"; done </run/module-errors

if [ -n "$DISK" ]; then
	model=$(cat "/sys/class/block/${DISK#/dev/}/device/model" | tr -s ' ')
	model=${model% } # padded to forty characters
	fact nvme "$NVME"
	fact nvme_model "$model"
	fact disk_bytes "$DISK_BYTES"
	pass nvme "$NVME $model, $((DISK_BYTES / MIB)) MiB"
else
	fail nvme "no NVMe namespace appeared within ten seconds: $(dmesg | grep -i nvme | tail -n 1)"
fi

iommu=
for each in /sys/class/iommu/*; do
	[ -e "$each" ] && iommu="$iommu ${each##*/}"
done
if [ -n "$iommu" ]; then
	fact iommu "${iommu# }"
	for folder in amd-iommu intel-iommu; do
		for file in /sys/class/iommu/*/$folder/*; do
			[ -f "$file" ] || continue
			value=$(cat "$file")
			diag "${file#/sys/class/iommu/} $value"
			fact "iommu_${file##*/}" "$value"
		done
	done
	pass present "${iommu# }"
else
	fail present "/sys/class/iommu is empty: $(dmesg | grep -iE 'AMD-Vi|DMAR|iommu' | tail -n 1)"
fi

dmesg | grep -E 'AMD-Vi|DMAR:|iommu: ' | grep -v 'Event logged' | cut -c1-300 | head -n 20 >/run/iommu-log
while read -r line; do diag "$line"; done </run/iommu-log
features=$(grep -m 1 -E 'Extended features' /run/iommu-log | sed 's/^.*Extended features/features/')
[ -n "$features" ] && fact iommu_printed "$features"
if grep -qE 'Completion-Wait loop timed out|Failed to|[Ff]ailed|error' /run/iommu-log; then
	fail initialised "$(grep -m 1 -E 'Completion-Wait loop timed out|Failed to|[Ff]ailed|error' /run/iommu-log)"
elif [ -n "$iommu" ]; then
	pass initialised "$features"
else
	skip initialised "no IOMMU"
fi

# With lazy flushing the kernel calls a translated DMA domain DMA-FQ.
group=$(readlink -f "$NVME_SYSFS/iommu_group" 2>/dev/null)
if [ -z "$NVME_SYSFS" ]; then
	skip group-type "no NVMe function"
elif [ -f "$group/type" ]; then
	type=$(cat "$group/type")
	fact group_type "$type"
	case $type in
	DMA | DMA-FQ) pass group-type "$NVME in group ${group##*/} of type $type" ;;
	*) fail group-type "$NVME in group ${group##*/} of type $type, which is not translated" ;;
	esac
else
	fail group-type "$NVME is in no IOMMU group"
fi
finish
