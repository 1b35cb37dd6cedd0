-- One who waited for a request's jobs leaves: cancel what is live of them, if nobody else waits.
-- ARGV: now, result_ttl, who leaves, ids... Returns how many were cancelled.
-- Names and no count: a call may run twice. One that is never taken out (its API process died, or it reads the jobs
-- later and never leaves) means that the jobs are drawn.

local now, result_ttl, waiter = now_ms(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local lead = key('job', ARGV[4])
local others = {}
for one in string.gmatch(call('HGET', lead, 'waiters') or '', '%S+') do
  if one ~= waiter then
    others[#others + 1] = one
  end
end
if #others > 0 then
  call('HSET', lead, 'waiters', table.concat(others, ' '))
  return 0
end
local cancelled = 0
for i = 4, #ARGV do
  cancelled = cancelled + math.max(0, cancel(ARGV[i], now, result_ttl))
end
return cancelled
