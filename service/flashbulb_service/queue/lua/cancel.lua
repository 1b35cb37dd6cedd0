-- Cancel a live job. ARGV: now, id, result_ttl. Returns 1, 0 when it had already ended, -1 when unknown.

local now = now_ms(ARGV[1])
local id, result_ttl = ARGV[2], tonumber(ARGV[3])
local job = call('HMGET', key('job', id), 'state', 'model', 'bucket', 'tenant')
local state = job[1]
if not state then
  return -1
elseif state == 'queued' then
  leave(id, job[2], job[3], job[4])
  settle(job[2])
elseif state == 'delayed' then
  call('ZREM', key('delayed'), id)
elseif state == 'running' then
  call('ZREM', key('leases'), id)
else
  return 0
end
call('HDEL', key('job', id), 'payload', 'code', 'message')
finish(id, 'cancelled', now, result_ttl)
return 1
