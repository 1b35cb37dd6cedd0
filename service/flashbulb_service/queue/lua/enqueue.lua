-- Store all jobs of one request, or none.
-- ARGV: now, tenant, instance, max_live, max_live_tenant, idempotency digest or '', request hash,
--       idempotency ttl, mode of the key, window of 'attach', record or '', owner, lists, events, hook (1 or ''),
--       result ttl,
--       then per job: id, model, bucket, payload, cost, weight, due in, deadline or '', max_attempts, wire
-- Returns {'created' | 'replayed', ids...}, {'conflict'}, {'draining', model}, {'late', predicted ms, allowed ms}
-- or {'full', scope, live, places missing, finished, over ms, limit}.

local now = now_ms(ARGV[1])
local tenant, instance = ARGV[2], ARGV[3]
local max_live, max_live_tenant = tonumber(ARGV[4]), tonumber(ARGV[5])
local idempotency = ARGV[6] ~= '' and key('idempotency', tenant, ARGV[6])
local request_hash, idempotency_ttl = ARGV[7], tonumber(ARGV[8])

-- 'replay': an equal request gets the first one's jobs. 'record': remember this one, whatever came before.
-- 'attach': like replay, if those jobs are live or ended well within the window, and else like record.
local mode, window_ms = ARGV[9], tonumber(ARGV[10])
local record, owner, lists, events, hook = ARGV[11], ARGV[12], ARGV[13], ARGV[14] ~= '', ARGV[15] ~= ''
local result_ttl = tonumber(ARGV[16])

local jobs, ids = {}, {}
for i = 17, #ARGV, 10 do
  local job = {
    id = ARGV[i], model = ARGV[i + 1], bucket = ARGV[i + 2], payload = ARGV[i + 3],
    cost = ARGV[i + 4], weight = ARGV[i + 5], due = now + tonumber(ARGV[i + 6]),
    deadline = ARGV[i + 7] ~= '' and now + tonumber(ARGV[i + 7]), max_attempts = tonumber(ARGV[i + 8]),
    wire = tonumber(ARGV[i + 9]),
  }
  jobs[#jobs + 1] = job
  ids[#ids + 1] = job.id
end

-- The client library sends a script again after a broken connection: ids are the caller's, so this is ours.
if call('EXISTS', key('job', ids[1])) == 1 then
  return { 'created', unpack(ids) }
end

local function attachable(id)
  if mode ~= 'attach' then
    return true
  end
  local job = call('HMGET', key('job', id), 'state', 'finished')
  return job[1] ~= 'failed' and job[1] ~= 'cancelled' and (not job[2] or tonumber(job[2]) > now - window_ms)
end

-- Who waits besides the one that stored the jobs, by ids as unique as those of jobs. See abandon.lua.
local function join(lead, waiter)
  local waiters = call('HGET', key('job', lead), 'waiters') or lead
  if not string.find(waiters, waiter, 1, true) then -- else this is sent again
    call('HSET', key('job', lead), 'waiters', waiters .. ' ' .. waiter)
  end
end

if idempotency and mode ~= 'record' then
  local known = call('GET', idempotency)
  if known then
    local hash, rest = string.match(known, '^(%S+) (.*)$')
    if hash ~= request_hash then
      return { 'conflict' }
    end
    -- A request that was kept and has been deleted is gone, though its jobs can still be read.
    local lead = string.match(rest, '%S+')
    local old, all_there = {}, record == '' or call('HEXISTS', key('job', lead), 'record') == 1
    for id in string.gmatch(rest, '%S+') do
      old[#old + 1] = id
      all_there = all_there and call('EXISTS', key('job', id)) == 1 and attachable(id)
    end
    if all_there then
      if mode == 'attach' then
        join(old[1], ids[1])
      end
      return { 'replayed', unpack(old) }
    end
  end
end

for _, job in ipairs(jobs) do
  if gate_of(job.model) == 'draining' then
    return { 'draining', job.model }
  end
end

local function refuse(scope, live, limit)
  local window = math.floor(now / WINDOW_MS)
  local finished = 0
  for w = window - 1, window do
    finished = finished + tonumber(call('GET', key('finished', string.format('%.0f', w))) or 0)
  end
  return { 'full', scope, live, live + #jobs - limit, finished, WINDOW_MS + now % WINDOW_MS, limit }
end

local in_use = call('HMGET', key('inuse'), '', tenant)
local live, live_tenant = tonumber(in_use[1] or 0), tonumber(in_use[2] or 0)
if live + #jobs > max_live then
  return refuse('total', live, max_live)
end
local of_key = tonumber(call('HGET', key('apikey', tenant), 'max_live') or '')
if live_tenant + #jobs > (of_key or max_live_tenant) then
  return refuse(of_key and 'key' or 'tenant', live_tenant, of_key or max_live_tenant)
end

-- Admission: when would the last of a bucket's new rows finish in its own place, after full batches of what is ahead?
-- Who is late after all is decided before a batch starts. nil while no live worker has published its times.
-- See docs/scheduling.md.
local MAX_WORKERS, MAX_TENANTS, MAX_OTHERS = 64, 64, 8

local function live_workers(model, bucket)
  local busy, found, ends = {}, {}, key(is_long(bucket) and 'long' or 'busy')
  local entries = call('HGETALL', key('speed', model, bucket))
  for i = 1, math.min(#entries, 2 * MAX_WORKERS), 2 do
    local alive, floor, base, row, cap = string.match(entries[i + 1], '^(%S+) (%S+) (%S+) (%S+) (%S+)$')
    if tonumber(alive) > now then
      found[#found + 1] = { id = entries[i], cap = cap + 0, base = base + 0, row = row + 0, floor = floor + 0 }
      busy[#busy + 1] = math.max(0, tonumber(call('ZSCORE', ends, entries[i]) or 0) - now)
    end
  end
  table.sort(busy)
  return found, busy
end

-- Rows that are served before ours: those due earlier, but of each other tenant no more than its fair share.
local function rows_ahead(model, bucket, due, num)
  local total = call('ZCOUNT', key('due', model, bucket), '-inf', due)
  if total == 0 then
    return 0
  end
  local tenants = call('ZRANGE', key('tenants', model, bucket), 0, MAX_TENANTS)
  if #tenants > MAX_TENANTS or (#tenants == 1 and tenants[1] == tenant) then
    return total
  end
  local mine = call('ZCARD', key('bucket', model, bucket, tenant))
  local fair = 0
  for _, name in ipairs(tenants) do
    fair = fair + math.min(call('ZCARD', key('bucket', model, bucket, name)), mine + num)
  end
  return math.min(total, fair)
end

-- What workers take for a batch of `rows` (default: a full one), and what they take at most: both on average.
local function mean_ms(workers, rows)
  local sum = 0
  for _, one in ipairs(workers) do
    sum = sum + math.max(one.floor, one.base + one.row * math.min(rows or one.cap, one.cap))
  end
  return sum / #workers
end

local function mean_cap(workers)
  local sum = 0
  for _, one in ipairs(workers) do
    sum = sum + one.cap
  end
  return sum / #workers
end

-- How long each of these workers is kept on average by rows of other buckets of the lane that are served before ours,
-- in full batches. The most urgent buckets are looked at; what is left out, the drop before a launch will meet.
local function others_ms(model, bucket, due, num, workers)
  local ours, ms, looked = {}, 0, 0
  for _, one in ipairs(workers) do
    ours[one.id] = true
  end
  for _, other_model in ipairs(call('SMEMBERS', key('models'))) do
    local ready = gate_of(other_model) ~= 'paused' and call('ZRANGE', key('ready', other_model), 0, MAX_OTHERS) or {}
    for _, other in ipairs(ready) do
      local is_own = other_model == model and other == bucket
      if not is_own and is_long(other) == is_long(bucket) and looked < MAX_OTHERS then
        looked = looked + 1
        local theirs, shared = live_workers(other_model, other), 0
        for _, one in ipairs(theirs) do
          shared = shared + (ours[one.id] and 1 or 0)
        end
        if shared > 0 then
          local batches = rows_ahead(other_model, other, due, num) / mean_cap(theirs)
          ms = ms + batches * mean_ms(theirs) / #theirs * shared / #workers
        end
      end
    end
  end
  return ms
end

local function predicted_ms(model, bucket, due, num)
  local found, busy = live_workers(model, bucket)
  if #found == 0 then
    return nil
  end
  local cap = mean_cap(found)
  local before = rows_ahead(model, bucket, due, num) + num - 1
  local batches = math.floor(before / cap)
  return others_ms(model, bucket, due, num, found) + busy[batches % #found + 1]
    + math.floor(batches / #found) * mean_ms(found) + mean_ms(found, before - batches * cap + 1)
end

local groups = {}
for _, job in ipairs(jobs) do
  if job.deadline then
    local name = job.model .. ' ' .. job.bucket
    local group = groups[name] or { model = job.model, bucket = job.bucket, num = 0, due = job.due, deadline = job.deadline }
    group.num, group.due = group.num + 1, math.max(group.due, job.due)
    group.deadline = math.min(group.deadline, job.deadline)
    groups[name] = group
  end
end
for _, group in pairs(groups) do
  local ms = predicted_ms(group.model, group.bucket, group.due, group.num)
  if ms and now + ms > group.deadline then
    return { 'late', math.ceil(ms), group.deadline - now }
  end
end

-- What a wake tells of a job that waits alone: a window on it, and what its claim will return.
local MAX_TOKEN_PAYLOAD = 65536

local function lone_token(job, used)
  if #job.payload > MAX_TOKEN_PAYLOAD or job.wire > 1 then -- any version may read a token
    return '1'
  end
  local row = { job.id, tenant, job.due, job.deadline or '', job.cost, job.weight, 0 }
  local window = { job.model, job.bucket, 1, { tenant, string.format('%.3f', used) }, row }
  local awaited = instance ~= '' and 1 or 0
  return cjson.encode({ now, window, { job.id, job.model, job.bucket, tenant, job.payload, 1, 0, now, awaited } })
end

for _, job in ipairs(jobs) do
  call('HSET', key('job', job.id), 'state', 'queued', 'model', job.model, 'bucket', job.bucket,
    'tenant', tenant, 'payload', job.payload, 'enqueued', now, 'due', job.due, 'cost', job.cost,
    'weight', job.weight, 'attempt', 0, 'burnt', 0, 'max_attempts', job.max_attempts, 'reply', instance,
    'wire', job.wire, 'lead', record ~= '' and ids[1] or '')
  if job.deadline then
    call('HSET', key('job', job.id), 'deadline', job.deadline)
  end
  local used = enter(job.id, job.model, job.bucket, tenant, job.due, now, job.deadline)
  settle(job.model, #jobs == 1 and job.bucket, function() return lone_token(job, used) end)
end
call('HINCRBY', key('inuse'), '', #jobs)
call('HINCRBY', key('inuse'), tenant, #jobs)
if record ~= '' then
  keep_request(ids, now, record, owner, lists, events, hook, result_ttl)
end
if idempotency then
  call('SET', idempotency, request_hash .. ' ' .. table.concat(ids, ' '), 'PX', idempotency_ttl)
end
return { 'created', unpack(ids) }
