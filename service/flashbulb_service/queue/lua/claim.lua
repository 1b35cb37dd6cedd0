-- Lease up to max_batch jobs of one bucket of one model to a worker.
-- ARGV: now, worker, max_batch, lease, result_ttl, models...
-- Returns {{id, model, bucket, tenant, payload, attempt, enqueued}, ...}.

local now = now_ms(ARGV[1])
local worker, max_batch, lease, result_ttl = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local MAX_DROPPED = 256 -- keeps one call short; the token that settle leaves calls the worker back

local function model_that_waited_longest()
  local best, since
  for i = 6, #ARGV do
    local oldest = call('ZRANGE', key('waiting', ARGV[i]), 0, 0, 'WITHSCORES')
    if oldest[1] and gate_of(ARGV[i]) ~= 'paused' and (not since or tonumber(oldest[2]) < since) then
      best, since = ARGV[i], tonumber(oldest[2])
    end
  end
  return best
end

local function lease_to_worker(id, job)
  local attempt = call('HINCRBY', key('job', id), 'attempt', 1)
  call('HSET', key('job', id), 'state', 'running', 'worker', worker, 'started', now)
  call('ZADD', key('leases'), now + lease, id)
  call('ZREM', key('deadlines'), id)
  note(id, 'running', now, 'attempt', attempt)
  return { id, job[1], job[2], job[3], job[4], attempt, tonumber(job[5]) }
end

local batch, dropped = {}, 0
while #batch == 0 and dropped < MAX_DROPPED do
  local model = model_that_waited_longest()
  if not model then
    break
  end
  local bucket = call('ZRANGE', key('ready', model), 0, 0)[1]
  local reached = tonumber(call('HGET', key('clock'), model) or 0)
  while #batch < max_batch and dropped < MAX_DROPPED do
    local head = call('ZPOPMIN', key('bucket', model, bucket))
    local id = head[1]
    if not id then
      break
    end
    call('ZREM', key('waiting', model), id)
    local job = call('HMGET', key('job', id), 'model', 'bucket', 'tenant', 'payload', 'enqueued', 'deadline')
    if job[6] and tonumber(job[6]) <= now then
      fail_overdue(id, now, result_ttl)
      dropped = dropped + 1
    else
      batch[#batch + 1] = lease_to_worker(id, job)
      reached = math.max(reached, tonumber(head[2]))
    end
  end
  -- Virtual time is the tag of the latest job in service; a tenant's tag behind it says nothing any more.
  call('HSET', key('clock'), model, reached)
  call('ZREMRANGEBYSCORE', key('tags', model), '-inf', reached)
  refresh(model, bucket)
  settle(model)
end
return batch
