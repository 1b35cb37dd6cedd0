-- Read what a worker may serve next; changes nothing.
-- ARGV: now, worker, most rows per bucket, models...
-- Returns {now, live workers, others with long work, {lane, used, ...}, {{model, clock, bucket, waiting,
--          {tenant, used, ...}, {id, tenant, due, deadline or '', cost, weight, burnt, ...}}, ...}}.

local now = now_ms(ARGV[1])
local worker, most_rows = ARGV[2], tonumber(ARGV[3])
local MAX_TENANTS, MAX_BUCKETS = 16, 16 -- keeps one call short

-- The tenants that are owed most come first, each with its share of the rows: nobody can fill the window.
local function look_into(model, bucket)
  local names = call('ZRANGE', key('tenants', model, bucket), 0, MAX_TENANTS - 1)
  local each = math.ceil(most_rows / #names)
  local used, rows = {}, {}
  for _, tenant in ipairs(names) do
    used[#used + 1] = tenant
    used[#used + 1] = string.format('%.3f', used_by(model, tenant))
    local heads = call('ZRANGE', key('bucket', model, bucket, tenant), 0, each - 1, 'WITHSCORES')
    for i = 1, #heads, 2 do
      local job = call('HMGET', key('job', heads[i]), 'deadline', 'cost', 'weight', 'burnt')
      for _, value in ipairs({ heads[i], tenant, heads[i + 1], job[1] or '', job[2], job[3], job[4] }) do
        rows[#rows + 1] = value
      end
    end
  end
  return { model, bucket, call('ZCARD', key('due', model, bucket)), used, rows }
end

local buckets = {}
for i = 4, #ARGV do
  local ready = gate_of(ARGV[i]) == 'paused' and {} or call('ZRANGE', key('ready', ARGV[i]), 0, MAX_BUCKETS - 1)
  for _, bucket in ipairs(ready) do
    buckets[#buckets + 1] = look_into(ARGV[i], bucket)
  end
end
local long = 0
for _, other in ipairs(call('ZRANGEBYSCORE', key('long'), now, '+inf')) do
  long = long + (other ~= worker and 1 or 0)
end
return { now, call('ZCOUNT', key('alive'), now, '+inf'), long, call('HGETALL', key('lanes')), buckets }
