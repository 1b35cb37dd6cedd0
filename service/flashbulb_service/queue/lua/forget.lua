-- Cancel what is live of a kept request, and forget the request. ARGV: now, id, result_ttl, lists of its owner...
-- Returns 1, or 0 when there is none.

local now, id, result_ttl = now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local kept = call('HMGET', key('job', id), 'record', 'rows')
if not kept[1] then
  return 0
end
for row in string.gmatch(kept[2], '%S+') do
  cancel(row, now, result_ttl)
end
call('HDEL', key('job', id), 'record', 'owner', 'rows')
for i = 4, #ARGV do
  call('ZREM', key('list', ARGV[i]), id)
end
return 1
